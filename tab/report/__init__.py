"""The report of a comparison, rebuilt from its directory: pictures/*.png and report.md."""

from .build import write_report

__all__ = ["write_report"]
