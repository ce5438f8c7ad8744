"""From results files to tables, figures and a page."""
