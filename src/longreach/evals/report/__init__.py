"""Results as tables, figures and one page of HTML."""
