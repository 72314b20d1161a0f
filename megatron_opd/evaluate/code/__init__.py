"""The grader `code`: a response's program against the tests of its prompt, isolated."""
