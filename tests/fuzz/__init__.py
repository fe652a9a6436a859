"""Damaged inputs of every kind, each of which must work, be refused in one line that names its file, or be counted.

damage.py spoils bytes, lines, JSON, tars and safetensors; targets.py has what reads them and what must be true then;
__main__.py runs them in processes of their own: `python -m tests.fuzz --minutes 60`.
"""
