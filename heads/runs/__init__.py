"""Runs: the folder of one trained head.

<run>/
  config.json           settings, view, spec, task, splits, what was chosen, versions; the other files with their hashes
  metrics.json, .csv    measures of val and test
  history.csv           a row for every epoch
  predictions.csv       of val and test, a row an image; splits.csv: where each image went
  answers.safetensors   digests of all images; raw logits beside labels and clusters: any measure can be made of them
  head.safetensors      the weights; backbone/ of a fine-tuned network
  report.html, *.png    the page and its pictures
  external/, explain/   what `evaluate` and `explain` add, each with a record of its own
"""
