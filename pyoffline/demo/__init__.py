"""`pyoffline demo`: the same fine-tuning twice, stock loss and pyoffline, on real text, with one
figure at the end.
"""
