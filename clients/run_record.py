"""run.json, where a `tally up` says where everything is, as those read it who find their servers by it."""

import json
from pathlib import Path


def read_address(record: Path, name: str) -> str:
    """The address under a name. Raises FileNotFoundError where there is no record, ValueError where it does not say it,
    whatever else is in its place."""
    try:
        content = json.loads(record.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    address = content.get(name) if isinstance(content, dict) else None
    if not (isinstance(address, str) and address and address.isprintable()):
        raise ValueError(f"it has no {name}")
    return address
