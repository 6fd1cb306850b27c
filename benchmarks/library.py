"""The `eventsourcing` library on the same job: `python -m benchmarks.library` with its orders as JSON on stdin.

Each vote is an aggregate whose id is that of its poll and voter, so that the library's own key allows one for each. It
says "ready", waits for a line, saves votes for some seconds, so many at once, and prints {"votes", "seconds"} as JSON.
"""

import json
import os
import sys
import time
from uuid import NAMESPACE_OID, UUID, uuid5


def main() -> None:
    orders = json.loads(sys.stdin.readline())
    os.environ.update(orders["environment"])
    # Only now: it reads its environment when it is imported.
    from eventsourcing.application import Application  # noqa: PLC0415
    from eventsourcing.domain import Aggregate  # noqa: PLC0415

    class Vote(Aggregate):
        def __init__(self, poll_id: str, voter_id: str, option_id: str) -> None:
            self.poll_id = poll_id
            self.voter_id = voter_id
            self.option_id = option_id

        @staticmethod
        def create_id(poll_id: str, voter_id: str) -> UUID:
            return uuid5(NAMESPACE_OID, f"{poll_id}/{voter_id}")

    application: Application[UUID] = Application()
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    votes = 0
    while time.perf_counter() - started < orders["seconds"]:
        numbers = range(orders["first"] + votes, orders["first"] + votes + orders["batch"])
        application.save(*(Vote(orders["poll_id"], f"voter-{number:012}", "yes") for number in numbers))
        votes += orders["batch"]
    print(json.dumps({"votes": votes, "seconds": time.perf_counter() - started}), flush=True)
    application.close()


if __name__ == "__main__":
    main()
