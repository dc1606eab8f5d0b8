"""What the pages of runs and of the bench share: charts, numbers written for people, templates and one style sheet.

Standard library and Jinja2 only, so that a run can be read where verl and torch are not installed.
"""
