// A poll from its creation to its results, in TypeScript: `npm ci && npm run build && npm start`, beside a running `tally up`.
import { randomUUID } from "node:crypto";
import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { CommandService } from "./gen/tally/command/v1/command_service_pb.js";
import { QueryService } from "./gen/tally/query/v1/query_service_pb.js";
import { VotingMethod } from "./gen/tally/poll/v1/poll_pb.js";
import { ErrorInfoSchema } from "./gen/google/rpc/error_details_pb.js";

// Connect has no gRPC service config, so this does what examples/service_config.json says: it repeats a call that is
// UNAVAILABLE, as while a server restarts. A command with a request_id takes effect once, and a vote counts once; the
// repeat of a vote with the same idempotency_key gets the first receipt.
const retry: Interceptor = (next) => async (request) => {
  for (let attempt = 1; ; attempt++) {
    try {
      return await next(request);
    } catch (error) {
      const { code, details } = ConnectError.from(error);
      // A broken connection: Connect names it like a call that the caller ended, or like a VOTE_CONFLICT, which has details.
      const broken = [Code.Canceled, Code.Aborted].includes(code) && !details.length && !request.signal.aborted;
      if (request.stream || attempt === 5 || !(code === Code.Unavailable || broken)) throw error;
      await new Promise((wake) => setTimeout(wake, 100 * 2 ** attempt * Math.random()));
    }
  }
};
const transport = (address: string) =>
  createGrpcTransport({ baseUrl: `http://${address}`, interceptors: [retry], defaultTimeoutMs: 5000 });
const commands = createClient(CommandService, transport(process.env.TALLY_COMMAND_ADDRESS ?? "127.0.0.1:50051"));
const queries = createClient(QueryService, transport(process.env.TALLY_QUERY_ADDRESS ?? "127.0.0.1:50052"));

// The reason, of tally.poll.v1.ErrorReason, why Tally refused a call.
function refusal(error: unknown): string {
  const refused = ConnectError.from(error);
  return `${refused.findDetails(ErrorInfoSchema).at(0)?.reason ?? Code[refused.code]}: ${refused.rawMessage}`;
}

const poll = {
  title: "Lunch?",
  method: VotingMethod.SINGLE_CHOICE,
  options: [{ optionId: "pizza", label: "Pizza" }, { optionId: "soup", label: "Soup" }],
};
const { pollId } = await commands.createPoll({ requestId: randomUUID(), poll });
await commands.openPoll({ requestId: randomUUID(), pollId });

const ballot = { pollId, voterId: "ada", optionIds: ["pizza"], idempotencyKey: process.env.VOTE_KEY ?? randomUUID() };
const vote = await commands.castVote(ballot);
const again = await commands.castVote(ballot);
console.log("receipt", vote.receipt?.receiptId, "again", again.receipt?.receiptId);
for (const mistake of [{ optionIds: ["salad"] }, { pollId: randomUUID() }]) {
  await commands.castVote({ ...ballot, voterId: "bob", ...mistake }).catch((error) => console.log("refused", refusal(error)));
}

// The answer shows the vote above, or a later state.
const { results } = await queries.getResults({ pollId, atLeastAsFresh: vote.consistencyToken });
for (const { label, count } of results?.counts ?? []) console.log(label, String(count));
