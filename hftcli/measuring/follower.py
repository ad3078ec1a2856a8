"""One of the processes that `hft eval` starts to ask along.

python -m hftcli.measuring.follower LEADER FILE RANK NUM_RANKS PORT
"""

import logging
import pickle
import sys
import threading
from pathlib import Path

from hftcli.measuring.ranks import Ranks, watch_leader
from hftcli.measuring.scoring import ask_along


def main() -> None:
    """Ask a share of the questions, without a word but where it fails."""
    leader, path, rank, num_ranks, port = sys.argv[1:]
    threading.Thread(target=watch_leader, args=(int(leader),), daemon=True).start()
    logging.disable(logging.WARNING)  # the first rank says it
    ranks = Ranks(int(rank), int(num_ranks))
    asked = pickle.loads(Path(path).read_bytes())
    ranks.join(int(port))
    ask_along(asked, ranks)


if __name__ == "__main__":
    main()
