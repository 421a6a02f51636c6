"""What predicts retraining? The parts of `truth.py`.

Imports go down this list: pictures, tables, judging, methods, peers, measuring, gauge, training, beds, chain.
"""
