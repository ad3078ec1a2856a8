"""Python reads this where its folder is on the path: as on a machine on which DeepSpeed is not installed."""

import sys
from importlib.machinery import PathFinder


class Blind(PathFinder):
    """Finds all but one package."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "deepspeed" else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Blind
