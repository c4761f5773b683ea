"""The evaluation of a model: what is measured (here) and computed from it (:mod:`rap_lightning.evaluation`).

Read in this order: evaluation_plan (options), run_evaluation (the sequence), evaluation_data (prompts and pairs),
measurements (samples and log-probabilities), evaluation_parts (one function per part of evaluation.json),
terminal_tables, merge_previous (a second evaluation in the same folder), recorded_run (what the training run recorded).
"""
