"""Steps from an older form of the tables to today's, in order; see ``database.migrate``."""
