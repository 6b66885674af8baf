"""Docstrings as the site shows them: what follows "Example:" is Python, and no prose."""

from griffe import Extension, Object


class Examples(Extension):
    def on_object(self, *, obj: Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:", "\nExamples: Example:")
