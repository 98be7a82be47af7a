"""Generation, with and without MTP drafts."""
