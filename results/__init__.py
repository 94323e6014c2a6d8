"""Run records, the papers' published tables, and everything that is made from them: tables, figures, report."""
