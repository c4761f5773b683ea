"""What a run of fit will take: memory of each rank, time of a step, and what to change where it does not fit.

In order: trace (one step without weights), estimate (what a strategy makes of it), gpus (published figures), planner
(a run, its advice), trainer_options (a run's strategy, devices and precision, as Lightning reads them).
"""
