"""A comparison written down: tables, figures and the page. Nothing is computed here that the analysis has not."""
