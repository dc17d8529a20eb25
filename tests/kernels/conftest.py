from implementations import force

__all__ = ["force"]
