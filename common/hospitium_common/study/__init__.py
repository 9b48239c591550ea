"""The study: one document that says everything a federated training will do."""

from hospitium_common.study.document import Study
from hospitium_common.study.reading import load_study, parse_study

__all__ = ["Study", "load_study", "parse_study"]
