"""Nobody looks at the pictures of the reports that are made here, and plugins can be forgotten."""

from pictures import dots as dots
from small_plugin import forgotten as forgotten
from small_plugin import mine as mine
