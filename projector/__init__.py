"""The projectors: each keeps one read model up to the stream of events. One that is lost is read again."""
