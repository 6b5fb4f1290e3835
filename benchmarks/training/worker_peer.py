"""Find label issues by cleanlab in labels and out-of-sample probabilities, and print their rows as JSON."""

from __future__ import annotations

import json
import sys

import numpy as np
from cleanlab.filter import find_label_issues

with np.load(sys.argv[1], allow_pickle=False) as file:
    labels, probs = file["labels"], file["probs"]
issues = find_label_issues(labels, probs, filter_by=sys.argv[2], n_jobs=1)
print(json.dumps(np.flatnonzero(issues).tolist()))
