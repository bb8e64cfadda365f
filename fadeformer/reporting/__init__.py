"""Model card, report and other HTML pages."""
