// A poll from its creation to its results, in Node: `npm ci && npm start`, beside a running `tally up`.
const path = require("node:path");
const crypto = require("node:crypto");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const options = { includeDirs: [path.join(__dirname, "../../protos")], keepCase: true, longs: Number, enums: String, defaults: true };
const load = (file) => loader.loadSync(file, options);
const { CommandService } = grpc.loadPackageDefinition(load("tally/command/v1/command_service.proto")).tally.command.v1;
const { QueryService } = grpc.loadPackageDefinition(load("tally/query/v1/query_service.proto")).tally.query.v1;
const Status = load("google/rpc/status.proto")["google.rpc.Status"];
const ErrorInfo = load("google/rpc/error_details.proto")["google.rpc.ErrorInfo"];

// gRPC repeats a call that is UNAVAILABLE, as while a server restarts. A command with a request_id takes effect once, and a
// vote counts once; the repeat of a vote with the same idempotency_key gets the first receipt.
const serviceConfig = require("../service_config.json");
const channel = { "grpc.service_config": JSON.stringify(serviceConfig) };
const credentials = grpc.credentials.createInsecure();
const commands = new CommandService(process.env.TALLY_COMMAND_ADDRESS || "127.0.0.1:50051", credentials, channel);
const queries = new QueryService(process.env.TALLY_QUERY_ADDRESS || "127.0.0.1:50052", credentials, channel);

const call = (client, method, request) =>
  new Promise((resolve, reject) =>
    client[method](request, { deadline: Date.now() + 5000 }, (error, answer) => (error ? reject(error) : resolve(answer))));

// The reason, of tally.poll.v1.ErrorReason, why Tally refused a call.
function refusal(error) {
  const [status] = error.metadata.get("grpc-status-details-bin");
  const info = status && Status.deserialize(status).details.find(({ type_url }) => type_url.endsWith("/google.rpc.ErrorInfo"));
  return `${info ? ErrorInfo.deserialize(info.value).reason : grpc.status[error.code]}: ${error.details}`;
}

async function main() {
  const poll = {
    title: "Lunch?",
    method: "VOTING_METHOD_SINGLE_CHOICE",
    options: [{ option_id: "pizza", label: "Pizza" }, { option_id: "soup", label: "Soup" }],
  };
  const { poll_id } = await call(commands, "CreatePoll", { request_id: crypto.randomUUID(), poll });
  await call(commands, "OpenPoll", { request_id: crypto.randomUUID(), poll_id });

  const idempotency_key = process.env.VOTE_KEY || crypto.randomUUID();
  const ballot = { poll_id, voter_id: "ada", option_ids: ["pizza"], idempotency_key };
  const vote = await call(commands, "CastVote", ballot);
  const again = await call(commands, "CastVote", ballot);
  console.log("receipt", vote.receipt.receipt_id, "again", again.receipt.receipt_id);
  for (const mistake of [{ option_ids: ["salad"] }, { poll_id: crypto.randomUUID() }]) {
    await call(commands, "CastVote", { ...ballot, voter_id: "bob", ...mistake }).catch((error) => console.log("refused", refusal(error)));
  }

  // The answer shows the vote above, or a later state.
  const { results } = await call(queries, "GetResults", { poll_id, at_least_as_fresh: vote.consistency_token });
  for (const { label, count } of results.counts) console.log(label, count);
  commands.close();
  queries.close();
}

main().catch((error) => {
  console.error(error.message);
  process.exit(1);
});
