"""Models: a batch's observation becomes features, and features become actions."""
