"""What two processes of Tally agree on beyond protobuf: names on the bus and in Redis, tokens, hashes and errors."""
