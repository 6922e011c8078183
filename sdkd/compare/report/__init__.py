"""Writing a report: tables, words, charts and the HTML page."""
