"""Units of work: who has claimed which, which are committed, and the merge of what they leave behind."""
