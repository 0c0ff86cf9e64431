"""Small trainings on a CPU: DDCAdam beside AdamW, SGD and Muon.

    python -m bench.train            everything, under 40 minutes on two idle cores
    python -m bench.train --quick    the same steps on tiny problems, under a minute

Each of four problems is trained by each optimizer at five learning rates, and from three seeds at
its best one. A run that was killed goes on where its last checkpoint is; a finished one is not
run again.
"""
