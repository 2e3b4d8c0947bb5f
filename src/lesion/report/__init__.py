"""The report of a study: tables, figures and one page that needs nothing but a browser."""
