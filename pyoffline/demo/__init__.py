"""`pyoffline demo`: the same training in less memory, and learning from one file of samples."""
