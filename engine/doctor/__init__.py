"""What would keep a run from starting, or from going well, and what to do about it; asked before the run.

A check is a function that is given the `Subject` and returns a `Finding`, or None where there is nothing to look at:

    def python_version(subject: Subject) -> Finding | None: ...

Its name is what the user reads. To add one, write it and put it in the list at the end of its file. A ValueError that
it raises is a finding too, since those of the engine say what to do; so is any other error, which then hides no other
check. What several checks need, the subject keeps (`Subject.once`): its failure is told once, by the first of them,
and the others are skipped.

No file here imports torch, transformers or deepspeed at its top: that they do not import is one of the findings.
"""
