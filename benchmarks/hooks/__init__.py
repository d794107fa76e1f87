"""`scripts/bench hooks`: what a hook costs, in time on one process and in traffic on two ranks.

Two libraries are measured in turns: this one, and flex-model 0.1.0, which has the same names and so
lives in an environment of its own. For each library and setting (`settings.py`)
there is a worker per rank (`workers.py`, `worker.py`) that does not know which library it got. It
builds the model (`llama.py`) and the ways to compare (`one_process.py`, `two_ranks.py`, both on
`hooking.py`) and runs them round by round. Plain torch runs in the same rounds, and is what each
library is held to. `traffic.py` counts collectives and bytes. The launcher (`__main__.py`,
`measure.py`) sets what is to be reached beside it (`targets.py`) and prints tables (`report.py`).
"""
