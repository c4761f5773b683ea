"""Tables and pictures."""


def write(output, lines, size):
    print(len(lines))
