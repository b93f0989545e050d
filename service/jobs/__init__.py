"""Jobs that survive: a store in a database, documents by content, and workers in processes of their own.

``Store`` says what was accepted and what became of it, ``Files`` holds documents and results, ``Supervisor`` takes jobs
from the store and has a ``Pool`` run them. Any number of services may share one store.
"""
