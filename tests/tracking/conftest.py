"""Nobody looks at the pictures of the reports that are made here."""

from pictures import dots as dots
