"""The suites of the benchmark verb. A suite is a function run(recorder) that times its stages with the recorder."""
