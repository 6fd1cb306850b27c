"""The read models: each is kept by a projector of its own, `python -m projector NAME`."""

from collections.abc import Mapping

# By name, the setting that says where the store of a read model is. In this order `tally up` runs their projectors.
READ_MODELS: Mapping[str, str] = {
    "live": "TALLY_REDIS_URL",
    "views": "TALLY_READ_DSN",
    "documents": "TALLY_READ_DSN",
}
