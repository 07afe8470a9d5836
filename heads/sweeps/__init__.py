"""Sweeps: many heads at once. The search space, the plan, training together, a journal that a killed one goes on from.

    <sweep>/
      sweep.json        its options, and which images, labels and splits it is about
      rows.jsonl        a line for every finished head
      heads/<name>/     run folders: of each family the chosen setting, one for every seed, repeat and fold
      search.jsonl      with --search optuna: a line for every batch of trials
      report.html …     written by the command

A killed sweep continues where it was; the same one with more options computes only what is new. Features that were
extracted otherwise since join it as another view, under another name. Another sweep, of other images, with another
protocol or another version of a head of one's own, is refused.
"""
