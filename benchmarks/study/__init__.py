"""The study of docs/study: what goals as text and as adapter strength are worth beside plain DPO.

Read ``settings`` (sizes), ``arms`` (what is compared), ``laboratory`` (base, pairs, prompts, judge), ``run`` (one
training run and its figures), ``schedule`` (which run comes next), ``report`` (tables and pictures).
"""
