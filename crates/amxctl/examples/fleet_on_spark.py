"""The baseline of a fleet as a job on Apache Spark: each partition is piped through `amxctl baseline
--tally`, and the tallies are merged as a tree.

    spark-submit fleet_on_spark.py HOSTS.jsonl FLEET.tally [PARTITIONS]

`amxctl` has to be in the PATH, in the same place on all executors. FLEET.tally is for `amxctl merge`, which prints the
baseline, or the CPU of a guest that runs on every host.
"""

import os
import subprocess
import sys
import tempfile

from pyspark.sql import SparkSession


def merge(one, other):
    """Two tallies as one. Order and shape make no difference, so that Spark may merge as it likes."""
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for name, tally in (("one", one), ("other", other)):
            names.append(os.path.join(folder, name))
            with open(names[-1], "w", encoding="utf-8") as file:
                file.write(tally)
        merged = subprocess.run(
            ["amxctl", "merge", "--tally", *names], stdout=subprocess.PIPE, text=True, check=True
        )
    return merged.stdout


def main():
    hosts, output = sys.argv[1:3]
    partitions = int(sys.argv[3]) if len(sys.argv) > 3 else None
    spark = SparkSession.builder.appName("amx-fleet").getOrCreate()
    lines = spark.sparkContext.textFile(hosts, partitions)
    # A pipe starts without any environment.
    path = {"PATH": os.environ["PATH"]}
    tallies = lines.pipe("amxctl baseline --tally", env=path, checkCode=True)
    with open(output, "w", encoding="utf-8") as file:
        file.write(tallies.treeReduce(merge))
    spark.stop()


if __name__ == "__main__":
    main()
