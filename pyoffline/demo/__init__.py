"""`pyoffline demo`: the same fine-tuning in less memory, and learning from one file of offline
samples; one figure each.
"""
