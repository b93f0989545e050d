"""Re-balancing a fleet that serves: when traffic has drifted, and whether moving experts pays."""
