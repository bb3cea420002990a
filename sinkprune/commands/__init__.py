"""The verbs of the command line, one file a group: ``add_commands`` adds their parsers. What a parser runs
takes the options and returns what ``--json`` prints and the text for people; heavy imports happen there."""
