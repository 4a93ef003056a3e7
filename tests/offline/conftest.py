from tests.support.work_folders import titled, work

__all__ = ["titled", "work"]
