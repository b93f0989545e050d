"""Figures of documents for a browser, one file each: data that Plotly draws, the same as text and as a table."""
