# One image for every host of a run: the repository and what it needs.
#   docker build --build-arg REQUIREMENTS=requirements-tpu.txt --tag plumb .
FROM python:3.12-slim
ARG REQUIREMENTS=requirements.txt

WORKDIR /plumb
COPY requirements*.txt ./
RUN pip install --no-cache-dir -r ${REQUIREMENTS}
COPY . .
CMD ["python", "train_sft.py", "--help"]
