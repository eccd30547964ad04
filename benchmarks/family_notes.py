"""What docs/family.md says beside the numbers."""

HEAD = """# The family, compared

TODO

Made by `python -m benchmarks.family_page` from the files in `benchmarks/results/comparisons`; the comparisons are in
`benchmarks/comparisons`, and how they are made fair is in [compare.md](compare.md).
"""

BEFORE: dict[str, str] = {}

GLUE = """## MRPC, CoLA and RTE

TODO
"""

AFTER = ""
