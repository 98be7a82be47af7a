"""A comparison written down: tables, figures and the page. Nothing is computed here that the analysis has not."""

from vwn.common.extras import require_packages

require_packages("vwn.lab.report", "accelerate", "jinja2", "matplotlib")
