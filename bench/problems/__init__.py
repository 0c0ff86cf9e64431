"""What is measured: each operation with its inputs, its fp64 truth and its torch formulations.

`bench.cases` gives them sizes.
"""

from bench.problems import adam, curvature, gram, kron, softmax
from bench.problems._problem import Form, Problem

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for module in (gram, kron, curvature, softmax, adam)
    for problem in module.PROBLEMS
}

__all__ = ["PROBLEMS", "Form", "Problem"]
