"""The demo: one job on a sharded model, run on one process and on two ranks, and compared.

The job (`job.py`) captures whole activations (`capture.py`), steers generation with an editing
function (`steering.py`) and trains a probe inside the model (`probe.py`). None of the three knows
how many processes there are. `__main__.py` makes the model, launches the job both ways
(`launch.py`) and prints what agrees (`report.py`).
"""
