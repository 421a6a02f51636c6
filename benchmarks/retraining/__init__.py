"""What predicts retraining? The parts of `truth.py`.

Imports go down this list: study, judging, peers, methods, measuring, gauge, training, beds, chain; pictures and tables
read results alone.
"""
